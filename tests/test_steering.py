"""Prompts, signals and bounds, recorded and fit to search with."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from search import steering
from search.base import LoadedBase
from search.evaluate import Scoring
from search.parts import assemble_parts
from search.prompts import PromptRequest
from search.steering import WrittenPrompts, confine_weak, prepare_prompts, prepare_steering
from search.trace import Trace, TraceWriter
from tests.test_experts import make_prompts
from tests.toys import BASE_NAME


@pytest.fixture
def parts(toy_model, toy_adapters):
    base = LoadedBase(toy_model("llama"), None, BASE_NAME, None, None)
    return assemble_parts(base, toy_adapters("llama"), base_name=BASE_NAME, kind="layer")


@pytest.fixture
def trace(tmp_path):
    with TraceWriter(tmp_path / "trace.jsonl") as writer:
        writer.header({})
        yield writer


def written():
    prompts = make_prompts(lengths=(9, 4, 12, 7, 5, 10, 6, 8, 11))
    return WrittenPrompts(*prompts.split(2))


def steer(parts, trace, weak_signal_nats=0.0):
    return prepare_steering(parts, written(), Scoring(), weak_signal_nats, trace)


def last_events(tmp_path):
    return {event["event"]: event for event in Trace.load(tmp_path / "trace.jsonl").events}


def test_prompts_are_split_and_recorded(parts, trace, tmp_path, monkeypatch):
    prompts = make_prompts(lengths=(5,) * 9)
    asked = {}
    monkeypatch.setattr(steering, "write_prompts", lambda *given: asked.update(given=given) or prompts)
    request = PromptRequest(per_adapter=3)
    both = prepare_prompts(parts, [(), (), ("{x}:",)], request, 2, trace)
    assert asked["given"][-2:] == ([(), (), ("{x}:",)], request)
    assert (both.searched.n_prompts, both.unseen.n_prompts) == (6, 3)
    event = last_events(tmp_path)["prompts"]
    assert event["sha256"] == prompts.sha256
    assert [prompt["expert"] for prompt in event["unseen"]] == ["expert-0", "expert-1", "expert-2"]
    first = event["searched"][0]
    assert first["ids"] == list(prompts.ids[0])
    assert first["scored"] == list(prompts.scored[0])
    assert (first["text"], first["from_skeleton"]) == (prompts.texts[0], True)


def test_without_weak_adapters_the_space_is_free(parts, trace, tmp_path, caplog):
    found = steer(parts, trace)
    assert found.weak == ()
    assert np.isinf(found.space.low).all()
    assert np.isinf(found.space.high).all()
    assert (found.start(0.3) == 0.3).all()
    assert not caplog.records
    events = last_events(tmp_path)
    assert events["signals"]["low"] == [None] * 3
    assert events["references"]["names"] == ["base", "uniform"]
    assert events["references"]["losses"][0] == pytest.approx(1)
    assert found.unseen_candidate_s > 0
    assert found.reference_scores.losses.tolist() == events["references"]["losses"]


def test_the_two_evaluators_are_on_different_prompts(parts, trace):
    found, both = steer(parts, trace), written()
    uniform = found.references[1].coefficients[None]
    n_tokens = [evaluator.score(uniform).n_tokens for evaluator in (found.searched, found.unseen)]
    assert n_tokens == [both.searched.n_tokens, both.unseen.n_tokens]


def test_weak_adapters_are_confined_started_at_uniform_and_named_loudly(parts, trace, tmp_path, caplog):
    peak_kl = np.array([0.5, 0.01, 0.2])
    signals = steering.expert_signals

    def with_known_kl(*given, **options):
        return replace(signals(*given, **options), peak_kl=peak_kl)

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(steering, "expert_signals", with_known_kl)
        found = steer(parts, trace, weak_signal_nats=0.2)  # not below: not weak
    assert found.weak == ("expert-1",)
    (record,) = caplog.records
    assert record.message.startswith("WEAK SIGNAL: nowhere in their own prompts do 1 of 3 adapters differ")
    assert "by 0.2 nats: expert-1 (0.010)." in record.message
    np.testing.assert_allclose(found.space.low, [-np.inf, 1 / 6, -np.inf])
    np.testing.assert_allclose(found.space.high, [np.inf, 1 / 2, np.inf])
    np.testing.assert_allclose(found.start(0.4), [[0.4, 1 / 3, 0.4]] * 2)
    assert last_events(tmp_path)["signals"]["weak"] == ["expert-1"]


def test_a_signal_that_is_not_a_number_is_weak(parts, trace, monkeypatch):
    signals = steering.expert_signals
    kl = np.array([np.nan, 1, 1])
    monkeypatch.setattr(steering, "expert_signals", lambda *a, **k: replace(signals(*a, **k), peak_kl=kl))
    assert steer(parts, trace).weak == ("expert-0",)


def test_a_single_weak_adapter_stays_near_itself(parts):
    space = confine_weak(parts.groups, np.array([True]))
    assert (space.low.tolist(), space.high.tolist()) == ([0.5], [1.5])
