"""Setup: what is loaded and checked before anything is computed, and what the trace's header says of it."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from search.balance import relative_norms, update_products
from search.base import load_base
from search.config import config_hash, load_config
from search.errors import InputError
from search.files import sha256_file
from search.priors import Prior, PriorBase, PriorObjective, PriorProvenance, PriorRun, save_prior
from search.resume import Record, refuse_changes
from search.setup import SPREAD_AT_ZERO, load_setup
from search.stages import OptimizerChoice
from search.trace import Trace, TraceWriter
from search.trust import bound
from tests.test_merges import save_toy_zoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_toy_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def base(zoo):
    """The base, loaded once for all tests."""
    return load_base(str(zoo.parent / "base"), device="cpu")


@pytest.fixture
def setup(zoo, base):
    """Load a setup with overrides."""
    return lambda *overrides, **options: load_setup(configured(zoo, *overrides), base, **options)


def configured(zoo, *overrides):
    return load_config(zoo, ["device=cpu", *overrides])


def starting_from(prior):
    """Overrides: a prior by layer, all else neutral at 0.3."""
    return f"search.prior={prior}", "search.space.groups=layer", "search.start=0.3"


def write_prior(path, adapters, start, spread=0.1, base_sha256=None):
    """A prior of one run; `adapters` are (name, sha256)."""
    table = np.full((2, len(adapters)), 0.0) + start
    run = PriorRun(
        trace="run/trace.jsonl",
        sha256="f" * 64,
        seed=3,
        evaluations=24,
        ended_by="evaluations",
        objective=PriorObjective("entropy_excess", "mean_sqrt"),
        winner="mean",
        loss=0.25,
        adapters=tuple(name for name, _ in adapters),
    )
    prior = Prior(
        names=run.adapters,
        hashes=tuple(sha256 for _, sha256 in adapters),
        runs_of=(1,) * len(adapters),
        groups=("layer.0", "layer.1"),
        start=table,
        spread=np.full(table.shape, spread),
        runs=(run,),
        base=PriorBase("base", base_sha256),
        provenance=PriorProvenance(None, {"numpy": "2"}),
    )
    save_prior(prior, path)
    return path


def free_of_bounds():
    """What `plan` reads of a steering without weak adapters."""
    return SimpleNamespace(bounds=bound(np.zeros(3), np.ones(3)))


def hash_of(zoo, name):
    return sha256_file(zoo.parent / "adapters" / name / "adapter_model.safetensors")


def test_without_a_prior_the_start_is_the_configured_one_everywhere(setup):
    loaded = setup("search.space=layer", "search.start=0.4", "search.sigma=0.2")
    np.testing.assert_array_equal(loaded.first.start, np.full((2, 3), 0.4))
    np.testing.assert_array_equal(loaded.first.spread, np.full((2, 3), 0.2))
    assert (loaded.prior, loaded.describe_prior(), loaded.describe()["prior"]) == (None, None, None)


def test_by_default_each_adapter_has_one_coefficient_and_starts_with_an_update_as_long_as_the_others(setup):
    loaded = setup()
    assert loaded.describe()["groups"] == ("model",)
    np.testing.assert_array_equal(loaded.first.start, [loaded.balanced])
    np.testing.assert_array_equal(loaded.first.spread, [loaded.balanced / 2])
    norms = loaded.balanced * np.sqrt(update_products(loaded.parts.stacked).diagonal())
    assert norms == pytest.approx(norms[0])
    assert not loaded.left_out


def test_the_spread_is_half_of_the_start_by_size_unless_it_is_given_or_the_start_is_zero(setup):
    for start, sigma, spread in ((-0.4, "null", 0.2), (0.0, "null", SPREAD_AT_ZERO), (0.0, 0.3, 0.3)):
        first = setup(f"search.start={start}", f"search.sigma={sigma}").first
        np.testing.assert_array_equal(first.spread, np.full((1, 3), spread))
    by_layer = setup("search.space=layer", "search.sigma=0.3")
    np.testing.assert_array_equal(by_layer.first.start, [by_layer.balanced] * 2)
    np.testing.assert_array_equal(by_layer.first.spread, np.full((2, 3), 0.3))


def test_a_prior_gives_start_and_spread_to_the_adapters_that_it_knows(zoo, setup, tmp_path):
    known = [("expert-2", hash_of(zoo, "expert-2")), ("expert-0", hash_of(zoo, "expert-0"))]
    path = write_prior(tmp_path / "prior.json", known, [0.7, 0.9], 0.05)
    loaded = setup(*starting_from(path))
    np.testing.assert_array_equal(loaded.first.start, [[0.9, 0.3, 0.7]] * 2)
    np.testing.assert_array_equal(loaded.first.spread, [[0.05, 0.15, 0.05]] * 2)
    identity = {"source": str(path), "sha256": sha256_file(path)}
    assert loaded.describe()["prior"] == identity
    assert loaded.describe_prior() == {**identity, "missing": ("expert-1",)}


def test_a_prior_of_other_weights_under_the_same_name_is_refused_unless_allowed(zoo, setup, tmp_path):
    path = write_prior(tmp_path / "prior.json", [("expert-0", "0" * 64)], 0.7)
    with pytest.raises(InputError, match="expert-0") as caught:
        setup(*starting_from(path))
    assert "allow_changed_adapters" in str(caught.value)
    assert "\n" not in str(caught.value)
    allowed = setup(*starting_from(path), "search.allow_changed_adapters=true")
    np.testing.assert_array_equal(allowed.first.start, [[0.7, 0.3, 0.3]] * 2)


def test_a_prior_of_another_base_is_refused_unless_allowed(zoo, base, setup, tmp_path):
    known = [("expert-0", hash_of(zoo, "expert-0"))]
    path = write_prior(tmp_path / "prior.json", known, 0.7, base_sha256="9" * 64)
    with pytest.raises(InputError, match=rf"^base: found weights .* {base.sha256[:12]}, .* {'9' * 12}: set"):
        setup(*starting_from(path))
    allowed = setup(*starting_from(path), "search.allow_changed_adapters=true")
    np.testing.assert_array_equal(allowed.first.start[:, 0], [0.7, 0.7])
    same = write_prior(tmp_path / "same.json", known, 0.7, base_sha256=base.sha256)
    assert setup(*starting_from(same)).first.missing == ("expert-1", "expert-2")


@pytest.mark.parametrize("scale", ["plain", "log"])
def test_a_prior_starts_within_a_space_without_negative_coefficients(zoo, setup, tmp_path, caplog, scale):
    known = [(name, hash_of(zoo, name)) for name in ("expert-0", "expert-1")]
    path = write_prior(tmp_path / "prior.json", known, [0.7, -0.4])
    np.testing.assert_array_equal(setup(*starting_from(path)).first.start, [[0.7, -0.4, 0.3]] * 2)
    caplog.clear()
    loaded = setup(*starting_from(path), "search.space.sign=non_negative", f"search.space.scale={scale}")
    np.testing.assert_array_equal(loaded.first.start, [[0.7, 0.0, 0.3]] * 2)
    assert "the prior has 2 negative coefficients" in caplog.text
    (stage,) = loaded.plan(free_of_bounds())
    genome, _ = stage.space.encode(loaded.first.start, loaded.first.spread)
    assert np.isfinite(genome).all()


def test_a_prior_by_layer_is_refused_for_a_search_of_the_whole_model_with_the_way_out(zoo, setup, tmp_path):
    path = write_prior(tmp_path / "prior.json", [("expert-0", hash_of(zoo, "expert-0"))], 0.7)
    with pytest.raises(InputError, match=r"groups of kind 'model'.*learnt on 2 of kind 'layer'") as caught:
        setup(f"search.prior={path}")
    assert str(caught.value).endswith(
        "set `search.space` so that the groups are of kind 'layer', as the prior's are"
    )
    assert setup(f"search.prior={path}", "search.space=layer").first.missing == ("expert-1", "expert-2")


def test_a_file_that_is_no_prior_is_named(setup, tmp_path):
    (tmp_path / "prior.json").write_text("{}")
    with pytest.raises(InputError, match=r"prior\.json") as caught:
        setup(f"search.prior={tmp_path / 'prior.json'}")
    assert "\n" not in str(caught.value)


def test_the_run_is_grouped_by_its_finest_stage_and_each_stage_has_its_own_space(setup):
    stages = "search.stages=[{share: 1, groups: model}, {share: 2, groups: part}, {share: 1}]"
    loaded = setup(stages, "search.space=layer")
    assert loaded.parts.shape == (4, 3)
    assert loaded.describe()["groups"][0] == "layer.0.attention"
    stages = loaded.plan(free_of_bounds())
    assert [stage.space.n_params for stage in stages] == [3, 12, 6]
    assert [stage.share for stage in stages] == [1, 2, 1]
    assert [stage.settings["groups"] for stage in stages] == ["model", "part", "layer"]


def test_the_header_is_plain_json_and_names_everything_a_result_depends_on(zoo, setup):
    loaded = setup("search.seed=7")
    header = json.loads(json.dumps(loaded.describe()))
    assert header["config"] == loaded.config.model_dump(mode="json")
    assert header["config_sha256"] == config_hash(loaded.config)
    assert (header["seed"], header["objective"], header["device"]) == (7, "entropy_excess", "cpu")
    assert [adapter["sha256"] for adapter in header["adapters"]] == [
        hash_of(zoo, f"expert-{index}") for index in range(3)
    ]


def test_the_header_of_the_same_run_does_not_refuse_itself(setup, tmp_path):
    header = setup("search.stages=[{share: 1, groups: model}, {share: 2}]").describe()
    refuse_changes(record_of(header, tmp_path), header, tmp_path)


def test_a_header_from_before_adapters_were_left_out_is_gone_on_with_unless_one_is(zoo, setup, tmp_path):
    header = setup("search.max_relative_norm=null").describe()
    old = {key: value for key, value in header.items() if key != "left_out"}
    del old["config"]["search"]["max_relative_norm"]
    refuse_changes(record_of(old, tmp_path), header, tmp_path)
    now = setup().describe()
    with pytest.raises(
        InputError, match=r"config\.search\.max_relative_norm = None, now it is 2\.0\. Set it back"
    ):
        refuse_changes(record_of(old, tmp_path), now, tmp_path)


def spoil(zoo, folder, **factors):
    """Copy the adapters, B of each named one (expert_1=1000) times a factor; the override that takes them."""
    copied = shutil.copytree(zoo.parent / "adapters", folder / "spoilt", dirs_exist_ok=True)
    for name, factor in factors.items():
        file = copied / name.replace("_", "-") / "adapter_model.safetensors"
        weights = load_file(file)
        save_file({key: w * factor if "lora_B" in key else w for key, w in weights.items()}, file)
    return f"adapters={copied}"


def test_a_broken_adapter_is_left_out_warned_of_and_named_in_the_header(zoo, setup, tmp_path, caplog):
    whole = setup()
    loaded = setup(spoil(zoo, tmp_path, expert_1=1000), "search.space=layer")
    assert loaded.parts.names == ("expert-0", "expert-2")
    assert [adapter.name for adapter in loaded.adapter_configs] == ["expert-0", "expert-2"]
    assert loaded.parts.shape == loaded.first.start.shape == (2, 2)
    size = relative_norms(whole.parts.model, whole.parts.stacked)[1] * 1000
    reason = f"its update is {size:.3g} times as large as the weights it changes (limit 2)"
    assert dict(loaded.left_out) == {"expert-1": reason}
    assert f"left out of the merge: expert-1: {reason}" in caplog.text
    header = json.loads(json.dumps(loaded.describe()))
    assert header["left_out"] == {"expert-1": reason}
    assert [adapter["name"] for adapter in header["adapters"]] == ["expert-0", "expert-2"]
    assert len(header["config"]["adapters"]) == 3


def test_the_same_weights_under_two_names_are_noted_once_and_kept(zoo, setup, tmp_path, caplog):
    folder = zoo.parent / "adapters"
    shutil.copytree(folder / "expert-0", tmp_path / "copy")
    assert setup().twins == []
    assert "several names" not in caplog.text
    loaded = setup(f"adapters=[{folder}/expert-0, {tmp_path}/copy, {folder}/expert-1]")
    assert loaded.parts.names == ("expert-0", "copy", "expert-1")
    assert loaded.twins == ["expert-0 and copy"]
    assert caplog.text.count("the same weights under several names") == 1
    assert "a coefficient of its own: expert-0 and copy. Leave all but one out?" in caplog.text


def test_where_all_adapters_are_broken_one_line_names_them_and_the_limit(zoo, setup, tmp_path):
    broken = spoil(zoo, tmp_path, expert_0=1000, expert_1=0, expert_2=1e15)
    with pytest.raises(InputError, match=r"^no adapter can be merged: expert-0: its update is .*") as caught:
        setup(broken)
    message = str(caught.value)
    assert (
        "expert-1: its update is zero: it is the base itself; expert-2: its update is 7.93e+14 times"
        in message
    )
    assert message.endswith("Check the files, or search.max_relative_norm.")
    assert "\n" not in message


def test_without_a_limit_any_adapter_is_kept_but_one_that_is_zero(zoo, setup, tmp_path):
    loaded = setup(spoil(zoo, tmp_path, expert_0=1000, expert_1=0), "search.max_relative_norm=null")
    assert loaded.parts.names == ("expert-0", "expert-2")
    assert dict(loaded.left_out) == {"expert-1": "its update is zero: it is the base itself"}
    assert np.isfinite(loaded.first.start).all()
    assert loaded.first.start[0, 1] == 1  # the most that there is: it stays the shorter by far
    assert loaded.first.start[0, 0] < 0.5


def test_an_adapter_that_changes_few_of_its_modules_is_not_taken_for_a_zero_one(zoo, setup, tmp_path):
    kept = spoil(zoo, tmp_path)
    file = tmp_path / "spoilt/expert-1/adapter_model.safetensors"
    weights = load_file(file)
    last = next(key for key in reversed(weights) if "lora_B" in key)
    save_file({key: w * (key == last or "lora_A" in key) for key, w in weights.items()}, file)
    assert setup(kept).parts.names == ("expert-0", "expert-1", "expert-2")


def record_of(header, folder):
    with TraceWriter(path := folder / "trace.jsonl") as trace:
        trace.header(header)
    return Record(Trace.load(path))


def test_an_objective_of_ones_own_goes_before_the_configured_one(setup, tmp_path, monkeypatch):
    def mine(merged_logp, expert_logp, next_tokens):
        return (merged_logp - expert_logp).abs().sum(-1)

    loaded = setup(objective=mine)
    assert loaded.objective is mine
    assert loaded.describe()["objective"].endswith(
        ":test_an_objective_of_ones_own_goes_before_the_configured_one.<locals>.mine"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "of_setup.py").write_text("def gap(m, e, t):\n    return (m - e).abs().sum(-1)\n")
    loaded = setup("objective.name=of_setup:gap")
    assert loaded.objective.__name__ == "gap"
    assert loaded.describe()["objective"] == "of_setup:gap"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["search.optimizer=CAM"], "unknown optimizer 'CAM'"),
        (["search.n_candidates=3", "search.max_evaluations=9"], "'CMA' needs at least 4 candidates"),
        (
            ["search.optimizer=OnePlusOne", "search.gradient.inject_every=1"],
            "inject_every is 1, but optimizer 'OnePlusOne' with 16 candidates takes no injected ones",
        ),
        (["objective.name=no_such_module:function"], "no_such_module"),
        (["objective.name=json:no_such_function"], "no_such_function"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_computed(setup, overrides, expected):
    with pytest.raises(InputError, match=expected) as caught:
        setup(*overrides)
    assert "\n" not in str(caught.value)


def test_an_optimizer_is_tried_in_the_space_of_every_stage(setup, monkeypatch):
    tried = []
    make = OptimizerChoice.make

    def record(self, start, spread, budget, stage):
        tried.append(len(start))
        return make(self, start, spread, budget, stage)

    monkeypatch.setattr(OptimizerChoice, "make", record)
    setup("search.stages=[{share: 1, groups: model}, {share: 1, groups: module}]")
    assert [n for n in tried if n != 2] == [3, 3 * 14]  # 2: whether it takes injected candidates at all


def test_the_base_is_loaded_where_none_is_handed_over(zoo, tmp_path):
    loaded = load_setup(configured(zoo))
    assert loaded.parts.base.source == str(zoo.parent / "base")
    shutil.copytree(zoo.parent / "adapters", tmp_path / "adapters")
    (tmp_path / "adapters/expert-1/adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="expert-1"):
        load_setup(configured(zoo, f"adapters={tmp_path / 'adapters'}"))
