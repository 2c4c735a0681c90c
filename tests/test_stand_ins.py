"""What a bundle has in place of what it leaves out, against what that is."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import load_peft_weights

from search.adapters import _REFUSED_SETTINGS, _check_settings, _pair_factors, check_adapter
from search.errors import InputError
from search.groups import group_modules
from search.memory import Reading, tokens_that_fit
from search.objective import OBJECTIVES, disagreement
from search.sampling import MAX_CACHED_TOKENS
from search.skeleton import parse_skeleton
from search.space import Layout, make_space
from search.stand_ins import (
    UNMERGEABLE,
    LenientTrace,
    as_it_is,
    check_fit,
    check_plain_lora,
    disagree,
    group_as_one,
    make_plain_space,
    most_cached_tokens,
    pair_plain_factors,
    read_settings,
    split_skeleton,
    tokens_free,
)
from tests.toys import MIXED, make_model, save_adapter

WHERE = "adapter 'a' (x)"


def test_settings_are_attributes_section_in_section():
    settings = read_settings({"search": {"seed": 3, "space": {"groups": "model"}}, "names": ["a"]})
    assert settings.search.space.groups == "model"
    assert settings.names == ["a"]
    with pytest.raises(AttributeError):
        _ = settings.search.nothing


def test_a_trace_that_cannot_be_written_is_given_up(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    trace = LenientTrace(tmp_path / "file" / "trace.jsonl")
    trace.write("header", seed=0)
    trace.event("merged", losses=np.array([np.nan]))
    assert "going on" in caplog.text
    trace = LenientTrace(tmp_path / "new" / "trace.jsonl")
    trace.event("merged", losses=np.array([np.nan]))
    line = json.loads((tmp_path / "new/trace.jsonl").read_text())
    assert line == {"kind": "event", "event": "merged", "losses": [None]}


def test_one_group_is_the_group_of_the_whole_model():
    modules = ["model.layers.1.mlp.up", "model.layers.0.attn.q", "head"]
    assert group_as_one(modules, "model") == group_modules(modules, "model")


def test_a_plain_space_is_the_full_signed_space():
    groups = group_modules([f"model.layers.{layer}.q" for layer in range(3)], "layer")
    low, high = np.array([-np.inf, -0.5]), np.array([0.4, np.inf])
    space = make_space(groups, 2, coarse=groups, layout=Layout(), low=low, high=high)
    plain = make_plain_space(None, groups, low, high)
    rng = np.random.default_rng(0)
    table, spread = rng.normal(size=(3, 2)), np.abs(rng.normal(size=(3, 2))) * [[0], [1], [1]]
    for ours, theirs in zip(plain.encode(table, spread), space.encode(table, spread), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    genomes = rng.normal(size=(5, plain.n_params))
    assert plain.n_params == space.n_params
    assert plain.shape == space.shape
    np.testing.assert_array_equal(plain.to_coefficients(genomes), space.to_coefficients(genomes))


@pytest.mark.parametrize("text", ["a{b} c{d_1}\n### Answer:", "{a} {1} {}{b}.", "no {slot}: {two words} x"])
def test_skeletons_are_split_as_they_are_parsed(text):
    assert split_skeleton(text) == parse_skeleton(text)


@pytest.fixture(scope="module", params=range(len(MIXED)))
def saved(request, tmp_path_factory):
    """Tensors and configuration of an adapter, as PEFT loads them."""
    folder = save_adapter(make_model(), tmp_path_factory.mktemp("saved") / "expert", MIXED[request.param])
    return load_peft_weights(str(folder), device="cpu"), LoraConfig.from_pretrained(str(folder)).to_dict()


def test_factors_are_paired_as_for_a_whole_run(saved):
    tensors, config = saved
    config["peft_type"] = "LORA"
    check_plain_lora(config, WHERE)
    ours, theirs = pair_plain_factors(tensors, config, WHERE), _pair_factors(tensors, config, WHERE)
    assert list(ours) == list(theirs)
    for name, factors in theirs.items():
        assert ours[name].scaling == factors.scaling
        assert torch.equal(ours[name].A, factors.A)
        assert torch.equal(ours[name].B, factors.B)


ODD = [
    *({setting: True} for setting in _REFUSED_SETTINGS),
    {"bias": "all"},
    {"peft_type": "LOHA"},
    {"init_lora_weights": "pissa_niter_4"},
]


@pytest.mark.parametrize("change", ODD, ids=str)
def test_what_a_whole_run_refuses_a_bundle_refuses(change):
    for check in (_check_settings, check_plain_lora):
        check({"peft_type": "LORA", "bias": "none", "r": 8, "use_rslora": True}, WHERE)
        with pytest.raises(InputError, match="adapter 'a'"):
            check({"peft_type": "LORA", **change}, WHERE)
    assert set(UNMERGEABLE) == set(_REFUSED_SETTINGS)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors, key: tensors.pop(key),
        lambda tensors, key: tensors.update({key: tensors[key][:1]}),
        lambda tensors, key: tensors.update({"base_model.model.embed_tokens.weight": tensors[key]}),
        lambda tensors, key: tensors.update({key.replace(".weight", ".bias"): tensors[key]}),
        lambda tensors, key: tensors.clear(),
    ],
)
def test_tensors_that_are_no_pairs_are_refused(saved, spoil):
    tensors, config = dict(saved[0]), {**saved[1], "peft_type": "LORA"}
    spoil(tensors, next(iter(tensors)))
    for pair in (_pair_factors, pair_plain_factors):
        with pytest.raises(InputError, match="adapter 'a'"):
            pair(tensors, config, WHERE)


def test_an_adapter_of_another_base_is_refused(toy_adapters, toy_model):
    adapter = toy_adapters("llama")[0]
    check_fit(adapter, toy_model("llama"), "base")
    for check in (check_adapter, check_fit):
        with pytest.raises(InputError, match="another base"):
            check(adapter, toy_model("gpt2"), adapter.base_name)
    factors = next(iter(adapter.modules.values()))
    wide = SimpleNamespace(A=factors.A[:, :-1], B=factors.B)
    odd = SimpleNamespace(name="a", modules={next(iter(adapter.modules)): wide})
    with pytest.raises(InputError, match="another base"):
        check_fit(odd, toy_model("llama"), "base")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_the_same(name):
    merged, expert = torch.log_softmax(torch.randn(2, 4, 7, dtype=torch.float64), -1)
    tokens = torch.tensor([1, 2, 3, 6])
    assert torch.equal(disagree(name, merged, expert, tokens), disagreement(name, merged, expert, tokens))


def test_what_is_as_good_stays_and_memory_is_not_asked_for():
    value = object()
    assert as_it_is(value) is value
    assert most_cached_tokens(None) == MAX_CACHED_TOKENS


def test_tokens_follow_from_the_free_memory_of_the_device_that_computes(monkeypatch):
    second, free = torch.device("cuda:1"), 10_000
    monkeypatch.setattr(torch.cuda, "memory_allocated", {second: 500}.get)
    monkeypatch.setattr(torch.cuda, "memory_reserved", {second: 1_500}.get)
    monkeypatch.setattr(torch.cuda, "mem_get_info", {second.index: (free, 40_000)}.get)
    assert tokens_free(second, 100, 1_000) == 64  # of (11,500 * 0.95 - 500 - 1,000) / 100 = 94
    assert tokens_free(second, 100, free) == 4
    assert tokens_free(second, 100, 2 * free) == 1
    reading = Reading(free=free, total=40_000, held=1_500, used=500)
    monkeypatch.setattr("search.memory.read_memory", lambda device: reading)
    for kept_bytes in (0, 1_000, 5_000, free, 2 * free):
        assert tokens_free(second, 9.5, kept_bytes) == tokens_that_fit(second, 9.5, kept_bytes)
