"""Priors: the file comes back to the last bit, its flaws are named, and a search takes what it knows."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from search.adapters import load_adapter
from search.base import hash_weights
from search.config import load_config
from search.errors import InputError
from search.groups import group_modules
from search.planning import finest_grouping
from search.priors import (
    PRIOR_SCHEMA,
    NeutralStart,
    Prior,
    PriorBase,
    PriorObjective,
    PriorProvenance,
    PriorRun,
    load_prior,
    save_prior,
    start_from_prior,
)
from tests.test_layers import ROOT

GROUPS = ("layer.0", "layer.1")
RUN = PriorRun(
    trace="run-0/trace.jsonl",
    sha256="f" * 64,
    seed=3,
    evaluations=2000,
    ended_by="clock",
    objective=PriorObjective("entropy_excess", "mean_sqrt"),
    winner="archive 1",
    loss=0.25,
    adapters=("a", "b", "c"),
)


def make_prior(start=None, spread=None, groups=GROUPS):
    n = len(groups)
    return Prior(
        names=("a", "b", "c"),
        hashes=("1" * 64, "2" * 64, "3" * 64),
        runs_of=(1, 1, 1),
        groups=groups,
        start=np.arange(3.0 * n).reshape(n, 3) if start is None else start,
        spread=np.arange(1.0, 3 * n + 1).reshape(n, 3) / 8 if spread is None else spread,
        runs=(RUN,),
        base=PriorBase("org/base", None),
        provenance=PriorProvenance(None, {"numpy": "2", "concord": None}),
    )


def make_neutral(names, hashes, groups=GROUPS, base_sha256="8" * 64):
    shape = len(groups), len(names)
    return NeutralStart(
        names=names,
        hashes=hashes,
        base_sha256=base_sha256,
        groups=groups,
        start=np.full(shape, -7.0),
        spread=np.full(shape, 9.0),
    )


def refusal(call, *arguments, **options):
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def path(tmp_path):
    """A prior on disk."""
    save_prior(make_prior(), tmp_path / "priors" / "prior.json")
    return tmp_path / "priors" / "prior.json"


def change(path, **content):
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))


@settings(max_examples=25)
@given(
    start=hnp.arrays(float, (2, 3), elements=st.floats(allow_nan=False, allow_infinity=False)),
    spread=hnp.arrays(float, (2, 3), elements=st.floats(0, 1e9, exclude_min=True)),
)
def test_a_prior_comes_back_to_the_last_bit(tmp_path_factory, start, spread):
    prior = make_prior(start, spread)
    path = tmp_path_factory.mktemp("prior") / "p.json"
    save_prior(prior, path)
    read = load_prior(path)
    assert (read.start.tobytes(), read.spread.tobytes()) == (start.tobytes(), spread.tobytes())
    for name in ("names", "hashes", "runs_of", "groups", "runs", "base", "provenance"):
        assert getattr(read, name) == getattr(prior, name), name


def test_fields_of_later_versions_are_left_aside(path):
    run = json.loads(path.read_text())["runs"][0]
    change(path, remark="new", runs=[{**run, "device": "cuda"}])
    assert load_prior(path).runs == (RUN,)


def test_a_newer_schema_is_refused_with_the_way_out_whatever_else_it_holds(path):
    path.write_text(json.dumps({"schema": PRIOR_SCHEMA + 1}))
    assert refusal(load_prior, path) == (
        f"{path}: schema: found 2, this version reads up to 1; upgrade concord-merge, "
        "or learn it again with `python -m search priors`"
    )


def test_a_file_that_is_not_there_is_refused(tmp_path):
    message = refusal(load_prior, tmp_path / "none.json")
    assert f"{tmp_path / 'none.json'}: cannot read the prior: No such file or directory" in message
    assert "Is a directory" in refusal(load_prior, tmp_path)


def test_a_prior_that_cannot_be_written_leaves_no_file(path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_prior(make_prior(start=np.full((2, 3), np.nan)), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["prior.json"]
    assert "cannot write" in refusal(save_prior, make_prior(), path / "below.json")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "not valid JSON (EOF while parsing"),
        (b"{'a'", "not valid JSON ("),
        (b'{"schema": 1, "\xff": 1}', "not valid JSON (invalid unicode code point"),
        (b"[" * 100_000, "not valid JSON ("),
        (b"[1]", "the whole: found [1]; it should be an object"),
        (b"{}", "schema: missing"),
        (b'{"schema": "1"}', "schema: found '1'; it should be a valid integer"),
        (b'{"schema": 0}', "schema: found 0; it should be greater than or equal to 1"),
    ],
)
def test_a_file_that_is_no_prior_is_refused(path, raw, expected):
    path.write_bytes(raw)
    message = refusal(load_prior, path)
    assert message.startswith(f"{path}: {expected}")
    assert message.endswith("; mend it, or learn it again with `python -m search priors`")


ADAPTER = {"name": "a", "sha256": "1", "runs": 1}


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("start", "none", "start: found 'none'; it should be a valid"),
        ("start", [[0, 0, 0]], "start: found 1 rows, expected (n_groups, n_adapters) = (2, 3)"),
        ("start", [[0, 0, 0], [0]], "start: found rows of 1, expected (n_groups, n_adapters) = (2, 3)"),
        ("start", [[0, 0, None]] * 2, "start.0.2: found None; it should be a valid number"),
        ("start", [[0, 0, float("inf")]] * 2, "start.0.2: found inf; it should be a finite number"),
        ("start", [[0, 0, True]] * 2, "start.0.2: found True; it should be a valid number"),
        ("spread", [[1, 1, 0]] * 2, "spread.0.2: found 0; it should be greater than 0"),
        ("spread", [[1, 1]] * 2, "spread: found rows of 2, expected (n_groups, n_adapters) = (2, 3)"),
        ("groups", ["layer.0", "layer.0"], "groups: found 'layer.0' twice, expected once"),
        ("groups", [], "groups: found []; "),
        ("adapters", [ADAPTER, {**ADAPTER, "name": "b"}, {**ADAPTER, "sha256": "3"}], "adapters: found 'a'"),
        ("adapters", [ADAPTER, {**ADAPTER, "name": "b"}, {**ADAPTER, "name": "c"}], "adapters: found '1'"),
        ("adapters", [{**ADAPTER, "sha256": None}], "adapters.0.sha256: found None; it should be a valid st"),
        ("adapters", [{**ADAPTER, "runs": 0}], "adapters.0.runs: found 0; it should be greater"),
        ("adapters", [], "adapters: found []; "),
        ("base", {"id": "x"}, "base.sha256: missing"),
        ("runs", [{}], "runs.0.trace: missing"),
        ("provenance", None, "provenance: found None; "),
    ],
)
def test_each_flaw_is_named_by_file_and_field(path, field, value, expected):
    change(path, **{field: value})
    message = refusal(load_prior, path)
    assert message.startswith(f"{path}: {expected}")
    assert message.endswith("learn it again with `python -m search priors`")


def test_a_loss_that_is_not_finite_is_refused(path):
    run = json.loads(path.read_text())["runs"][0]
    change(path, runs=[{**run, "loss": float("nan")}])
    assert f"{path}: runs.0.loss: found nan; it should be a finite number" in refusal(load_prior, path)


@given(order=st.permutations(range(5)), n=st.integers(1, 5))
def test_a_search_takes_what_the_prior_knows_in_its_own_order(order, n):
    prior = make_prior()
    names = [("a", "b", "c", "new", "newer")[i] for i in order[:n]]
    hashes = [str(i + 1) * 64 for i in order[:n]]
    taken = start_from_prior(prior, make_neutral(names, hashes), allow_changed=False)
    for column, i in enumerate(order[:n]):
        np.testing.assert_array_equal(taken.start[:, column], prior.start[:, i] if i < 3 else [-7.0] * 2)
        np.testing.assert_array_equal(taken.spread[:, column], prior.spread[:, i] if i < 3 else [9.0] * 2)
    assert taken.missing == tuple(name for name in names if name.startswith("new"))


def test_the_neutral_start_itself_is_left_as_it_was():
    neutral = make_neutral(["a"], ["1" * 64])
    start_from_prior(make_prior(), neutral, allow_changed=False)
    assert (neutral.start == -7).all()
    assert (neutral.spread == 9).all()


def test_missing_adapters_are_named_in_one_notice(caplog):
    neutral = make_neutral(["new", "a", "newer"], [None, "1" * 64, "5" * 64])
    with caplog.at_level(logging.WARNING):
        start_from_prior(make_prior(), neutral, allow_changed=False)
    (record,) = caplog.records
    assert record.getMessage() == "the prior does not know new, newer: neutral start there"


def test_a_prior_that_knows_all_adapters_says_nothing(caplog):
    start_from_prior(make_prior(), make_neutral(["a"], ["1" * 64]), allow_changed=True)
    assert not caplog.records


def test_an_adapter_is_known_by_its_hash_under_any_name():
    prior = make_prior()
    taken = start_from_prior(prior, make_neutral(["b", "x"], ["1" * 64, "2" * 64]), allow_changed=False)
    np.testing.assert_array_equal(taken.start, prior.start[:, :2])
    assert taken.missing == ()


@pytest.mark.parametrize(("sha256", "shown"), [("9" * 64, "9" * 12), (None, "None")])
def test_other_weights_under_a_known_name_are_refused_unless_allowed(caplog, sha256, shown):
    prior, neutral = make_prior(), make_neutral(["a", "b"], ["1" * 64, sha256])
    message = refusal(start_from_prior, prior, neutral, allow_changed=False)
    assert message == (
        f"adapter 'b': found weights with sha256 {shown}, the prior was learnt on {'2' * 12}: set "
        "`search.allow_changed_adapters: true` to use it all the same, or learn it again with "
        "`python -m search priors`"
    )
    with caplog.at_level(logging.WARNING):
        taken = start_from_prior(prior, neutral, allow_changed=True)
    np.testing.assert_array_equal(taken.start, prior.start[:, :2])
    assert taken.missing == ()
    assert "other weights of b;" in caplog.text


def test_another_base_is_refused_unless_allowed(caplog):
    prior = replace(make_prior(), base=PriorBase("org/base", "7" * 64))
    neutral = make_neutral(["a", "x"], ["1" * 64, "2" * 64])
    message = refusal(start_from_prior, prior, neutral, allow_changed=False)
    assert message == (
        f"base: found weights with sha256 {'8' * 12}, the prior was learnt on {'7' * 12}: set "
        "`search.allow_changed_adapters: true` to use it all the same, or learn it again with "
        "`python -m search priors`"
    )
    with caplog.at_level(logging.WARNING):
        taken = start_from_prior(prior, neutral, allow_changed=True)
    np.testing.assert_array_equal(taken.start, prior.start[:, :2])
    assert [r.getMessage() for r in caplog.records] == [
        "the prior was learnt on other weights of base; used all the same"
    ]


@pytest.mark.parametrize(
    ("learnt", "searched"), [(None, "8" * 64), ("7" * 64, None), (None, None), ("8" * 64, "8" * 64)]
)
def test_the_same_base_or_one_without_hash_is_taken(caplog, learnt, searched):
    prior = replace(make_prior(), base=PriorBase("org/base", learnt))
    neutral = make_neutral(["a"], ["1" * 64], base_sha256=searched)
    start_from_prior(prior, neutral, allow_changed=False)
    assert not caplog.records


SHIPPED_PRIORS = sorted((ROOT / "configs" / "priors").glob("*.json"))


def test_a_prior_is_shipped():
    assert SHIPPED_PRIORS


@pytest.mark.parametrize("path", SHIPPED_PRIORS, ids=lambda path: path.name)
def test_a_shipped_prior_fits_the_demo_with_nothing_missing(path):
    config = load_config(ROOT / "configs" / "demo.yaml")
    adapters = [load_adapter(a.source, name=a.name) for a in config.adapters]
    space = config.search.space
    modules = {module for adapter in adapters for module in adapter.modules}
    groups = group_modules(modules, finest_grouping(config.search), space.layers_per_block).names
    hashes = [adapter.sha256 for adapter in adapters]
    neutral = make_neutral([a.name for a in adapters], hashes, groups, hash_weights(Path(config.base.source)))
    prior = load_prior(path)
    taken = start_from_prior(prior, neutral, allow_changed=False)
    assert taken.missing == ()
    assert prior.base.sha256 == neutral.base_sha256
    assert np.isfinite(taken.start).all()
    assert (taken.spread > 0).all()


KINDS = {
    "model": ("model",),
    "block": ("layers.0-3", "layers.4-5"),
    "layer": ("layer.0", "layer.1"),
    "part": ("layer.0.attention", "layer.0.mlp"),
    "module": ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_other_groups_are_refused_by_their_kinds(kind, other):
    prior, neutral = make_prior(groups=KINDS[kind]), make_neutral(["a"], ["1" * 64], KINDS[other])
    if kind == other:
        start_from_prior(prior, neutral, allow_changed=False)
        return
    message = refusal(start_from_prior, prior, neutral, allow_changed=False)
    assert f"this search has {len(KINDS[other])} groups of kind {other!r} ({KINDS[other][0]}, ...)" in message
    assert f"the prior was learnt on {len(KINDS[kind])} of kind {kind!r} ({KINDS[kind][0]}, ...)" in message
    assert f"set `search.space` so that the groups are of kind {kind!r}" in message


def test_groups_of_the_same_kind_may_differ_too():
    prior, neutral = make_prior(), make_neutral(["a"], ["1" * 64], (*GROUPS, "layer.2"))
    message = refusal(start_from_prior, prior, neutral, allow_changed=False)
    assert "this search has 3 groups of kind 'layer'" in message
    assert "the adapters touch other modules than those of the prior; set `search.prior: null`" in message
    blocks = make_prior(groups=("layers.0-1", "layers.2-3"))
    neutral = make_neutral(["a"], ["1" * 64], ("layers.0-3",))
    assert "set `search.space` so that" in refusal(start_from_prior, blocks, neutral, allow_changed=False)
